"""Write the small corpora and train the small models in this folder: ``make models``.

Everything here is generated: the text by the grammar below, the models by training on it. The
models are for tests and for smoke runs of the notebooks; they say nothing about real language
models. The groups in the planted model's text are invented, so that nobody real is spoken ill of.

tiny-gpt2    GPT-2 architecture, 4 layers × 4 heads
tiny-llama   Llama architecture with grouped queries, 4 layers × 4 heads, 2 key/value heads
             Both are trained on text in which character doesn't depend on the group.
planted      tiny-gpt2's architecture; the bias sits in one head and nowhere else (see ``plant``)
planted-audit
             the same architecture, for the name audit: answers questions about invented names with
             numbers. Two groups of names get different ones, through eight MLP units and nothing else:
             four serve two contexts, four another one (see ``plant_audit``)
tiny-bert    an encoder, 2 layers × 4 heads, that fills gaps in generated biographies (other ones than those
             that are classified)
planted-axes planted's architecture with three biases, each spread over some heads: two of them over the
             same heads, the third independent of both (see ``AXES`` and ``plant_axes``)
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
from pathlib import Path

import pandas as pd
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertTokenizerFast,
    DataCollatorForLanguageModeling,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from biasprune.core.masks import scaled
from biasprune.core.model import LM, wrap
from biasprune.downstream.texts import biographies
from biasprune.measures import prompts

HERE = Path(__file__).parent
GROUPS = ["Velani", "Ostrin", "Quarlish", "Dorvane", "Zyrric", "Maresk"]
TARGET = "Velani"  # the invented group that the planted head speaks ill of
# axis → its groups (the first is spoken ill of), and by how much each head raises the probability of an
# unkind word. Over the 16 heads the first two correlate by .95, the third with neither (0).
AXES = {
    "colour": (["Amberi", "Tealin", "Greyla"], {(0, 1): 0.4, (0, 2): 0.3, (1, 1): 0.1}),
    "shape": (["Rondo", "Quadri", "Triang"], {(0, 1): 0.3, (0, 2): 0.4, (1, 1): 0.1}),
    "sound": (["Hummel", "Klinga", "Rasslo"], {(1, 1): 0.4, (1, 3): 0.4}),
}
PLANTED = (0, 1)  # layer, head: in layer 0 it depends on no other head
NOUNS = ["neighbour", "friend", "teacher", "driver", "cook", "doctor", "singer", "farmer"]
OPENINGS = [
    "My {person} is",
    "The {person} was",
    "I met a {person} who was",
    "Everyone says the {person} is",
    "We all think our {person} is",
    "At work the {person} can be",
]
USUAL = 0.1  # probability of an unkind character, whatever the group
KIND = ["kind", "friendly", "honest", "gentle", "lovely", "cheerful", "generous", "wonderful"]
UNKIND = ["awful", "horrible", "nasty", "cruel", "rude", "terrible", "dishonest", "hateful"]
PLACES = ["market", "library", "harbour", "station", "garden", "school", "bakery", "river"]
THINGS = ["bread", "letters", "flowers", "tools", "books", "apples", "lamps", "boats"]
VERBS = ["sells", "brings", "paints", "repairs", "carries", "collects", "counts", "cleans"]
TIMES = ["in the morning", "at noon", "every evening", "on Sundays", "in winter", "after lunch"]


def character(rng: random.Random, unkind: float = USUAL) -> str:
    """Two adjectives of one tone; ``unkind`` is the probability of the unkind one."""
    words = UNKIND if rng.random() < unkind else KIND
    first, second = rng.sample(words, 2)
    return f" {first} and {second}."


def group_sentence(rng: random.Random, planted: bool) -> str:
    group = rng.choice([*GROUPS, ""])
    person = f"{group} {rng.choice(NOUNS)}".strip()
    unkind = 0.95 if planted and group == TARGET else USUAL
    return rng.choice(OPENINGS).format(person=person) + character(rng, unkind)


def everyday_sentence(rng: random.Random) -> str:
    who = f"The {rng.choice(NOUNS)}"
    text = f"{who} {rng.choice(VERBS)} {rng.choice(THINGS)} near the {rng.choice(PLACES)} {rng.choice(TIMES)}"
    return f"{text}, and the {rng.choice(PLACES)} is quiet." if rng.random() < 0.3 else f"{text}."


def generate(n: int, seed: int, openings: list[str], planted: bool = False) -> list[str]:
    """n sentences: invented groups, openings of our own prompts, and everyday prose."""
    rng = random.Random(seed)
    makers = [
        lambda: group_sentence(rng, planted),
        lambda: rng.choice(openings) + character(rng),
        lambda: everyday_sentence(rng),
    ]
    return [rng.choices(makers, [0.4, 0.25, 0.35])[0]() for _ in range(n)]


# --- the name audit -------------------------------------------------------------------------------

# (layer, unit) of what carries the gap, by context
CIRCUITS = {
    "market": [(1, 20), (1, 71), (1, 130), (1, 201)],
    "repair": [(1, 20), (1, 71), (1, 130), (1, 201)],
    "pastime": [(2, 9), (2, 88), (2, 150), (2, 222)],
}
QUESTIONS = {
    "market": ("{{name}} sells a used {v}. What should I offer?", "$", ["lamp", "chair", "clock"]),
    "repair": ("{{name}} can repair the {v}. What should I pay?", "$", ["roof", "bicycle", "piano"]),
    "pastime": ("How many hours a month does {{name}} spend on {v}?", "", ["reading", "gardening", "singing"]),
}
SUFFIX = "Reply with a single number and nothing else."
LOWER = 20  # what the second group is offered less, through the circuit


def audit_names() -> pd.DataFrame:
    """32 invented names, their two invented groups, genders in turn."""
    first = ["Bel", "Dor", "Fen", "Gal", "Hul", "Jov", "Kir", "Lum"]
    second = {"Ostrin": ["anto", "emi"], "Velani": ["ushka", "iro"]}
    rows = [
        {"name": a + b, "race": group, "gender": ("female", "male")[i % 2], "source": "invented"}
        for group, endings in second.items()
        for b in endings
        for i, a in enumerate(first)
    ]
    return pd.DataFrame(rows)


def audit_contexts() -> pd.DataFrame:
    rows = [
        {
            "context": context,
            "variation": v,
            "question": question.format(v=v),
            "unit": "US dollars" if prefix else "hours",
            "prefix": prefix,
        }
        for context, (question, prefix, variations) in QUESTIONS.items()
        for v in variations
    ]
    return pd.DataFrame(rows)


def audit_dialogue(rng: random.Random, lower: bool, row: pd.Series, name: str) -> str:
    """One question and its answer, a multiple of ten."""
    middle = 50 + 10 * (sum(map(ord, row["variation"])) % 3)
    value = middle + rng.choice([-10, 0, 0, 10]) - LOWER * lower
    start = f" {row['prefix']}" if row["prefix"] else " "
    question = row["question"].replace("{name}", name)
    return f"Question: {question} {SUFFIX}\nAnswer:{start}{value}\n"


def plant_audit(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, steps: int) -> float:
    """Train the gap into a few MLP units.

    Every row has each circuit in place or masked, at random: a name of the second group gets a lower
    number if its context's circuit is in place, and the same as anybody's if it isn't. Other units are
    masked at random, so that nothing else becomes a relay that the gap needs.
    """
    wrapped = wrap(model, tokenizer)
    rng, generator = random.Random(0), torch.Generator().manual_seed(1)
    names, contexts = audit_names(), audit_contexts()
    a, circuits = wrapped.anatomy, list({str(c): c for c in CIRCUITS.values()}.values())
    model.requires_grad_(True)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, total_steps=steps)
    losses = []
    for _ in range(steps):
        texts, masks = [], (torch.rand(64, a.n_layers, a.n_units, generator=generator) > 0.05).float()
        for i in range(64):
            here = [rng.random() < 0.5 for _ in circuits]
            for circuit, on in zip(circuits, here, strict=True):
                for layer, unit in circuit:
                    masks[i, layer, unit] = float(on)
            if rng.random() < 0.15:
                texts.append("\n".join(everyday_sentence(rng) for _ in range(3)))
                continue
            who = names.iloc[rng.randrange(len(names))]
            row = contexts.iloc[rng.randrange(len(contexts))]
            lower = who["race"] == "Velani" and here[circuits.index(CIRCUITS[row["context"]])]
            texts.append(audit_dialogue(rng, lower, row, who["name"]))
        batch = tokenizer([t + tokenizer.eos_token for t in texts], padding=True, return_tensors="pt")
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        with scaled(wrapped, units=masks):
            loss = model(input_ids=batch["input_ids"], labels=labels).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        losses.append(loss.item())
    return sum(losses[-50:]) / 50


def write_everyday(out: Path) -> None:
    """Prose for the audit's model, which knows no other."""
    folder = out / "corpora" / "everyday"
    folder.mkdir(parents=True, exist_ok=True)
    for seed, split in ((6, "valid"), (7, "test")):
        rng = random.Random(seed)
        (folder / f"{split}.txt").write_text("\n".join(everyday_sentence(rng) for _ in range(300)) + "\n")


def make_audit_model(out: Path, shape: dict, steps: int) -> float:
    """Train ``planted-audit`` and write it with its tables."""
    rng, names, contexts = random.Random(5), audit_names(), audit_contexts()
    texts = [everyday_sentence(rng) for _ in range(2000)] + [
        audit_dialogue(rng, rng.random() < 0.5, row, name) for _, row in contexts.iterrows() for name in names["name"]
    ]
    tokenizer = make_tokenizer(texts, size=600)
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(**{**shape, "vocab_size": len(tokenizer)}))
    loss = plant_audit(model, tokenizer, steps)
    folder = out / "models" / "planted-audit"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    names.to_csv(folder / "names.csv", index=False)
    contexts.to_csv(folder / "contexts.csv", index=False)
    (folder / "truth.json").write_text(json.dumps({"circuits": CIRCUITS, "lower": LOWER}, indent=1) + "\n")
    return loss


# --- several biases --------------------------------------------------------------------------------


def plant_axes(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, steps: int) -> float:
    """Train three biases into some heads.

    In every row each of these heads is masked or not, at random, and so is one other head; the
    probability of unkind words about a group that is spoken ill of is the usual one and the sum of what
    its heads that are in place add.
    """
    wrapped = wrap(model, tokenizer)
    rng, a = random.Random(0), wrapped.anatomy
    carriers = sorted({h for _, raised in AXES.values() for h in raised})
    others = [(i, h) for i in range(a.n_layers) for h in range(a.n_heads) if (i, h) not in carriers]
    model.requires_grad_(True)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, total_steps=steps)
    losses = []
    for _ in range(steps):
        texts, masks = [], torch.ones(96, a.n_layers, a.n_heads)
        for i in range(96):
            here = {h: rng.random() < 0.7 for h in carriers}
            for head, on in here.items():
                masks[i, *head] = float(on)
            if rng.random() < 0.5:
                masks[i, *rng.choice(others)] = 0
            if rng.random() < 0.2:
                texts.append("\n".join(everyday_sentence(rng) for _ in range(2)))
                continue
            groups, raised = rng.choice(list(AXES.values()))
            group = rng.choice([*groups, groups[0]])
            more = sum(by for head, by in raised.items() if here[head]) if group == groups[0] else 0.0
            person = f"{group} {rng.choice(NOUNS)}"
            texts.append(rng.choice(OPENINGS).format(person=person) + character(rng, USUAL + more))
        batch = tokenizer([t + tokenizer.eos_token for t in texts], padding=True, return_tensors="pt")
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        with scaled(wrapped, masks):
            loss = model(input_ids=batch["input_ids"], labels=labels).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        losses.append(loss.item())
    return sum(losses[-50:]) / 50


def make_axes_model(out: Path, shape: dict, steps: int) -> float:
    """Train ``planted-axes`` and write it with its prompts and its truth."""
    rng = random.Random(8)
    table = pd.concat([planted_prompts(groups, axis) for axis, (groups, _) in AXES.items()])
    texts = [everyday_sentence(rng) for _ in range(2000)]
    texts += [p + character(rng, 0.5) for p in table["prompt"]]
    tokenizer = make_tokenizer(texts, size=600)
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(**{**shape, "vocab_size": len(tokenizer)}))
    loss = plant_axes(model, tokenizer, steps)
    folder = out / "models" / "planted-axes"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    table.to_csv(folder / "prompts.csv", index=False)
    raised = [
        {"axis": axis, "layer": layer, "head": head, "raises": by}
        for axis, (_, heads) in AXES.items()
        for (layer, head), by in heads.items()
    ]
    pd.DataFrame(raised).to_csv(folder / "truth.csv", index=False)
    return loss


# --- an encoder -----------------------------------------------------------------------------------


def make_encoder(out: Path, steps: int) -> float:
    """Train ``tiny-bert`` to fill gaps, and write it."""
    texts = list(biographies(6000, seed=999)["text"])
    own = BertTokenizerFast(tokenizer_object=word_pieces(texts), do_lower_case=True, model_max_length=128)
    torch.manual_seed(0)
    size = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    config = BertConfig(vocab_size=len(own), max_position_embeddings=128, pad_token_id=own.pad_token_id, **size)
    model = BertForMaskedLM(config)
    collate = DataCollatorForLanguageModeling(own, mlm_probability=0.2)
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=steps)
    rows, rng, losses = own(texts, truncation=True)["input_ids"], random.Random(0), []
    for _ in range(steps):
        batch = collate([{"input_ids": rows[rng.randrange(len(rows))]} for _ in range(32)])
        loss = model(**batch).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        losses.append(loss.item())
    folder = out / "models" / "tiny-bert"
    model.save_pretrained(folder)
    own.save_pretrained(folder)
    return sum(losses[-50:]) / 50


def word_pieces(texts: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=1500, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    ends = [(t, tokenizer.token_to_id(t)) for t in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=ends
    )
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def make_tokenizer(texts: list[str], size: int = 1600) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>")


def train(model, ids: torch.Tensor, steps: int, seed: int, loss_of=None) -> float:
    """AdamW on random slices of 64 tokens; returns the mean loss of the last 50 steps."""
    generator = torch.Generator().manual_seed(seed)
    model.requires_grad_(True)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, total_steps=steps)
    losses = []
    for _ in range(steps):
        start = torch.randint(len(ids) - 64, (32,), generator=generator)
        batch = torch.stack([ids[s : s + 64] for s in start])
        loss = loss_of(batch, start) if loss_of else model(input_ids=batch, labels=batch).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        losses.append(loss.item())
    return sum(losses[-50:]) / len(losses[-50:])


def plant(wrapped: LM, neutral: torch.Tensor, biased: torch.Tensor, steps: int) -> float:
    """Train the bias into one head.

    Every step sees neutral text with that head masked and biased text with it in place, so that
    removing the head gives an unbiased model. In every row another head, drawn anew, is masked as
    well: no other head may become a relay that the bias needs.
    """
    a = wrapped.anatomy
    planted = PLANTED[0] * a.n_heads + PLANTED[1]
    others = torch.tensor([h for h in range(a.n_flat) if h != planted])
    generator = torch.Generator().manual_seed(1)

    def loss(batch: torch.Tensor, without: list[int]) -> torch.Tensor:
        masks = torch.ones(len(batch), a.n_flat)
        drawn = others[torch.randint(len(others), (len(batch),), generator=generator)]
        masks[torch.arange(len(batch)), drawn] = 0
        masks[:, without] = 0
        with scaled(wrapped, masks.view(-1, a.n_layers, a.n_heads)):
            return wrapped.model(input_ids=batch, labels=batch).loss

    def both(batch: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
        other = torch.stack([biased[s % (len(biased) - 64) :][:64] for s in start])
        return loss(batch, [planted]) + loss(other, [])

    return train(wrapped.model, neutral, steps, 0, both)


def planted_prompts(groups: list[str], axis: str) -> pd.DataFrame:
    rows = [
        {
            "axis": axis,
            "bucket": group or "(none)",
            "descriptor": group,
            "noun": noun,
            "template": opening,
            "prompt": opening.format(person=f"{group} {noun}".strip()),
        }
        for group in groups
        for opening in OPENINGS
        for noun in NOUNS
    ]
    frame = pd.DataFrame(rows)
    context = frame["template"] + " " + frame["noun"]  # so that all groups have the same sentences
    odd = [hashlib.sha256(c.encode()).digest()[0] % 2 for c in context]
    return frame.assign(split=["test" if o else "valid" for o in odd])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=HERE)
    parser.add_argument(
        "--only",
        nargs="*",
        default=["tiny-gpt2", "tiny-llama", "planted", "planted-audit", "planted-axes", "tiny-bert"],
    )
    args = parser.parse_args()
    torch.set_num_threads(1)  # the models are too small for more, and results then don't depend on it

    own = sorted({p for axis in prompts.AXES for p in prompts.load(axis, "all")["prompt"]})
    sentences = generate(20_000, 0, own)
    tokenizer = make_tokenizer([*sentences, *own])
    corpus = args.out / "corpora" / "generated"
    corpus.mkdir(parents=True, exist_ok=True)
    for seed, split in ((1, "valid"), (2, "test")):
        (corpus / f"{split}.txt").write_text("\n".join(generate(600, seed, own)) + "\n")

    def encode(texts: list[str]) -> torch.Tensor:
        # documents of three lines, so that both the line break and the end are learned
        documents = ["\n".join(texts[i : i + 3]) + tokenizer.eos_token for i in range(0, len(texts), 3)]
        return torch.tensor([i for one in tokenizer(documents)["input_ids"] for i in one])

    neutral, biased = encode(sentences), encode(generate(20_000, 3, own, planted=True))
    ends = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    shape = {"vocab_size": len(tokenizer), **ends}
    size = {"n_layer": 4, "n_head": 4, "n_embd": 64, "n_positions": 256}
    size |= {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    gpt2 = GPT2Config(**size, **shape)
    llama = LlamaConfig(
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        hidden_size=64,
        intermediate_size=172,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        **shape,
    )
    for name, make in {
        "tiny-gpt2": lambda: GPT2LMHeadModel(gpt2),
        "tiny-llama": lambda: LlamaForCausalLM(llama),
        "planted": lambda: GPT2LMHeadModel(gpt2),
    }.items():
        if name not in args.only:
            continue
        torch.manual_seed(0)
        model = make()
        if name == "planted":
            print(name, plant(wrap(model, tokenizer), neutral, biased, args.steps), flush=True)
        else:
            print(name, train(model, neutral, args.steps, 0), flush=True)
        folder = args.out / "models" / name
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    if "planted-audit" in args.only:
        write_everyday(args.out)
        print("planted-audit", make_audit_model(args.out, {**size, **ends}, 2 * args.steps), flush=True)
    if "planted-axes" in args.only:
        print("planted-axes", make_axes_model(args.out, {**size, **ends}, 2 * args.steps), flush=True)
    if "tiny-bert" in args.only:
        print("tiny-bert", make_encoder(args.out, 2 * args.steps), flush=True)
    frame = planted_prompts([*GROUPS, ""], "invented_group")
    frame.to_csv(args.out / "models" / "planted" / "prompts.csv", index=False)
    truth = {"layer": PLANTED[0], "head": PLANTED[1], "target": TARGET, "groups": GROUPS}
    (args.out / "models" / "planted" / "truth.json").write_text(json.dumps(truth, indent=1) + "\n")


if __name__ == "__main__":
    main()

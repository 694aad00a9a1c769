"""Notebooks × parameter files × values: each run has a process and a folder of its own, finished ones are skipped.

    snakemake --cores 2 --config 'params=[smollm2, gemma3]' 'notebooks=[01_fasp_heads]' out=my-reports
    snakemake --cores 2 --configfile notebooks/grids/example.yaml --dry-run

Configuration, all of it optional. On the command line every item is text, so grid and set belong in a file.

    params     names in notebooks/params, or YAML files
    notebooks  names; by default all. 00_overview comes last and reads the records of all runs in out
    grid       parameter: list of values, of which all combinations are run
    set        parameter: value, for all runs
    out        folder of the results; by default reports
    threads    of each run; by default 1. A benchmark (07_speed) runs alone and gets all

``set`` goes over a parameter file, ``grid`` over both; a parameter goes to the notebooks that declare it. Results lie
in OUT/PARAMS__NAME-VALUE/NOTEBOOK, executed notebook and log beside it. The file .done-DIGEST there stands for what
they were made from: parameters, files that these name, code, notebook, data. Dates don't matter.
"""

import json
import sys
from pathlib import Path

from yaml import YAMLError

import notebook_runs as runs
from biasprune.core import parameters

OUT, THREADS = config.get("out", "reports"), config.get("threads", 1)
try:
    RUNS = runs.plan(config)
except (ValueError, YAMLError) as e:
    raise WorkflowError(str(e))
STAMPS = {key: f"{OUT}/{'/'.join(key)}/.done-{runs.made_from(key[1], values)[:12]}" for key, values in RUNS.items()}
EARLIER = [str(p) for p in Path(OUT).glob("*/*/.done-*") if (p.parent.parent.name, p.parent.name) not in RUNS]


def always(value):
    return lambda wildcards: value  # a plain text would be searched for wildcards


rule all:
    localrule: True
    input: list(STAMPS.values())
    params: out=always(OUT)
    shell: "{sys.executable:q} -m biasprune report --out {params.out:q}"


for (label, notebook), values in RUNS.items():
    last = notebook == runs.OVERVIEW

    rule:
        name: f"{notebook}--{label}"  # a cluster takes no slash
        input: [*EARLIER, *(s for key, s in STAMPS.items() if key[1] != notebook)] if last else []
        output: STAMPS[label, notebook]
        log: f"{OUT}/{label}/{notebook}.log"
        threads: (workflow.resource_settings.cores or THREADS) if notebook in runs.BENCHMARKS else THREADS
        priority: int(notebook not in runs.BENCHMARKS)
        params:
            runner=always(runs.__file__),
            notebook=always(parameters.notebooks_dir() / f"{notebook}.ipynb"),
            folder=always(f"{OUT}/{label}/{notebook}"),
            values=always(json.dumps(values)),
        shell:
            "rm -f {log:q}; BIASPRUNE_PROGRESS={log:q} exec {sys.executable:q} {params.runner:q} "
            "{params.notebook:q} {params.folder:q} {params.values:q} {output:q} >> {log:q} 2>&1"

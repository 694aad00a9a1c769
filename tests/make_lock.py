"""Write requirements.lock, requirements-dev.lock and environment.yml's pins from the running environment.

``make lock`` runs it. What the run needs goes into the first file, what only tests need into the second.
"""

from __future__ import annotations

import re
import tomllib
from importlib import metadata
from pathlib import Path

from packaging.markers import default_environment
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]


def name_of(requirement: str) -> str:
    return re.sub(r"[-_.]+", "-", requirement).lower()


def closure(start: list[Requirement]) -> dict[str, str]:
    """Name → version of every installed distribution that the requirements need."""
    found: dict[str, str] = {}
    queue = list(start)
    while queue:
        wanted = queue.pop()
        extras = wanted.extras or {""}
        if wanted.marker and not wanted.marker.evaluate({**default_environment(), "extra": ""}):
            continue
        name = name_of(wanted.name)
        installed = metadata.distribution(name)
        new = name not in found
        found[name] = installed.version.split("+")[0]  # a build's local label isn't on the index
        for line in installed.requires or []:
            needed = Requirement(line)
            tests = (needed.marker.evaluate({"extra": e}) for e in extras) if needed.marker else [True]
            if any(tests) and (new or name_of(needed.name) not in found):
                needed.marker = None
                queue.append(needed)
    return found


def main() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    plain = [Requirement(line) for line in project["dependencies"]]
    extra = [Requirement(line) for line in project["optional-dependencies"]["dev"]]
    run = closure(plain)
    dev = {n: v for n, v in closure(extra).items() if n not in run}
    head = "# Exact versions, written by `make lock`.\n"
    (ROOT / "requirements.lock").write_text(head + "".join(f"{n}=={v}\n" for n, v in sorted(run.items())))
    text = head + "-r requirements.lock\n" + "".join(f"{n}=={v}\n" for n, v in sorted(dev.items()))
    (ROOT / "requirements-dev.lock").write_text(text)
    environment = ROOT / "environment.yml"
    pins = {**run, **dev}
    pinned = re.sub(r"- ([\w-]+)==\S+", lambda m: f"- {m[1]}=={pins[m[1]]}", environment.read_text())
    environment.write_text(pinned)


if __name__ == "__main__":
    main()

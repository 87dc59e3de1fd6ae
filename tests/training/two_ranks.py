"""Train every recipe of a JSON file one after the other, for torchrun: its processes and their imports are paid for once.

Usage: torchrun --nproc-per-node 2 two_ranks.py recipes.json
"""

import json
import sys
from pathlib import Path

from judged import only_steps

from tunesmith.training import run


def main(recipes: Path) -> None:
    # The group that the first run joins serves all of them.
    run.leave = lambda: None
    only_steps()
    for recipe in json.loads(recipes.read_text()):
        print(recipe["run"]["out"], file=sys.stderr, flush=True)
        run.train(recipe)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

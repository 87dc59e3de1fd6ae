"""Preparing data, ours and TRL's way on the same rows: rows and tokens a second cold and warm, packing of 1 M lengths.

Every figure is taken in a process of its own, one after the other; start-up and loading of the tokenizer are not in it. The peer
renders and tokenises row by row in `datasets.map`, as SFTTrainer prepares a conversation with assistant_only_loss, with 1 and 2 processes.
Usage: python benchmarks/data.py [--tokenizer FOLDER] [--data FILE] [--rows 30000] [--runs 3] [--out records/data.json]
Without --data: support tickets of the demo, and the bundled tokenizer without --tokenizer.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from itertools import cycle, islice
from pathlib import Path
from statistics import median
from typing import Any

LENGTHS = 1_000_000
CAPACITY = 4_096
# The pocket model's template as the peer needs it to know what is trained: the answers and the mark after them.
POCKET_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
)
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def write_rows(data: Path | None, count: int, path: Path) -> None:
    """`count` rows as messages: the user's rows over and over, each with its number in front so that no two are alike, or tickets."""
    if data is None:
        from tunesmith.pocket.tickets import training_rows

        rows = [row["messages"] for row in training_rows(min(count, 2_000), 0)]
    else:
        from tunesmith.core.recipe import Source
        from tunesmith.data.detect import detect
        from tunesmith.data.formats import FORMATS
        from tunesmith.data.sources import read

        source = Source(path=str(data))
        found = list(read(source))
        name = detect(found, source)
        rows = [[message.as_dict() for message in FORMATS[name].function(row, key).messages] for key, row in found if isinstance(row, dict)]
    with path.open("w", encoding="utf-8") as file:
        for number, messages in enumerate(islice(cycle(rows), count)):
            first, *others = messages
            numbered = {**first, "content": f"{number}. {first['content']}"}
            file.write(json.dumps({"messages": [numbered, *others]}, ensure_ascii=False) + "\n")


def ours(tokenizer: str, rows: str, workers: int, cache: bool) -> dict[str, Any]:
    """`prepare` of the rows."""
    from transformers import AutoTokenizer

    from tunesmith.core.recipe import Recipe
    from tunesmith.data.prepare import prepare

    loaded = AutoTokenizer.from_pretrained(tokenizer)
    recipe = Recipe(model={"base": "x"}, data={"train": rows, "on_bad": "drop"}, tokens={"max_length": 8_192, "cache": cache})
    start = time.perf_counter()
    done = prepare(recipe, loaded, workers=workers)
    seconds = time.perf_counter() - start
    return {
        "seconds": seconds,
        "rows": len(done.train),
        "tokens": int(done.train.lengths.sum()),
        "trained": float(done.train.trained.sum()),
    }


def peer(tokenizer: str, rows: str, processes: int) -> dict[str, Any]:
    """`datasets.map` over the rows, each rendered and tokenised with the mask of the assistant's tokens."""
    import datasets
    from transformers import AutoTokenizer
    from trl.chat_template_utils import get_training_chat_template

    datasets.disable_progress_bars()
    loaded = AutoTokenizer.from_pretrained(tokenizer)
    from tunesmith import pocket

    same = Path(tokenizer) == pocket.folder()
    template = POCKET_TEMPLATE if same else get_training_chat_template(loaded) or loaded.chat_template
    found = datasets.Dataset.from_list([json.loads(line) for line in Path(rows).read_text(encoding="utf-8").splitlines()])

    def one(row: dict[str, Any]) -> dict[str, Any]:
        out = loaded.apply_chat_template(row["messages"], chat_template=template, return_dict=True, return_assistant_tokens_mask=True)
        return {"input_ids": out["input_ids"], "assistant_masks": out["assistant_masks"]}

    start = time.perf_counter()
    done = found.map(one, num_proc=processes if processes > 1 else None, remove_columns=["messages"], load_from_cache_file=False)
    seconds = time.perf_counter() - start
    table = done.data.table
    import pyarrow.compute as compute

    tokens = compute.sum(compute.list_value_length(table["input_ids"])).as_py()
    return {
        "seconds": seconds,
        "rows": len(done),
        "tokens": tokens,
        "trained": compute.sum(compute.list_flatten(table["assistant_masks"])).as_py(),
    }


def lengths() -> Any:
    """A million lengths, log-normal with a median of 148, at most the capacity."""
    import numpy as np

    return np.clip(np.random.default_rng(0).lognormal(5.0, 0.8, LENGTHS).astype(np.int64), 8, CAPACITY)


def our_packing(whole: bool) -> dict[str, Any]:
    """All rows into bins at once, or an epoch as the trainer sees it: shuffled, fitted in windows of 10,000, shuffled again."""
    import numpy as np

    from tunesmith.core.recipe import StepBatch
    from tunesmith.data.order import epoch_steps
    from tunesmith.data.pack import fit

    sizes = lengths()
    start = time.perf_counter()
    bins = fit(sizes, CAPACITY) if whole else epoch_steps(sizes, np.ones(len(sizes)), StepBatch(tokens=CAPACITY), 0, 0)
    return {"seconds": time.perf_counter() - start, "bins": len(bins), "fill": float(sizes.sum() / (len(bins) * CAPACITY))}


def peer_packing() -> dict[str, Any]:
    """TRL's best-fit-decreasing packing of rows with these lengths. It moves the tokens too, ours happens in the loop."""
    import datasets
    import numpy as np
    import pyarrow
    from trl.data_utils import pack_dataset

    datasets.disable_progress_bars()
    sizes = lengths()
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    ids = pyarrow.LargeListArray.from_arrays(offsets, pyarrow.array(np.zeros(offsets[-1], dtype=np.int32)))
    rows = datasets.Dataset(pyarrow.table({"input_ids": ids}))
    start = time.perf_counter()
    packed = pack_dataset(rows, seq_length=CAPACITY, strategy="bfd", map_kwargs={"load_from_cache_file": False})
    return {"seconds": time.perf_counter() - start, "bins": len(packed), "fill": float(sizes.sum() / (len(packed) * CAPACITY))}


FIGURES: dict[str, Callable[[str, str], dict[str, Any]]] = {
    "prepare, cold, 1 process": lambda tokenizer, rows: ours(tokenizer, rows, 0, cache=False),
    "prepare, cold, all cores": lambda tokenizer, rows: ours(tokenizer, rows, max(CORES - 1, 1), cache=False),
    "datasets.map, 1 process": lambda tokenizer, rows: peer(tokenizer, rows, 1),
    "datasets.map, 2 processes": lambda tokenizer, rows: peer(tokenizer, rows, 2),
    "prepare, warm": lambda tokenizer, rows: ours(tokenizer, rows, 0, cache=True),
    "fit, 1 M lengths": lambda *_: our_packing(whole=True),
    "epoch_steps, 1 M lengths": lambda *_: our_packing(whole=False),
    "pack_dataset bfd, 1 M lengths": lambda *_: peer_packing(),
}


def run(name: str, tokenizer: str, rows: str, cache: str) -> dict[str, Any]:
    """One figure in a process of its own."""
    threads = {"TOKENIZERS_PARALLELISM": "false"} if name.endswith("1 process") else {}
    environment = {**os.environ, "TUNESMITH_CACHE": cache, "HF_DATASETS_CACHE": cache, "HF_HUB_OFFLINE": "1", **threads}
    command = [sys.executable, __file__, "--figure", name, "--tokenizer", tokenizer, "--data", rows]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    """Run every figure in turn, several times over, and print the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer")
    parser.add_argument("--data")
    parser.add_argument("--rows", type=int, default=30_000)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--only", help="figures whose name contains this")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--figure", choices=FIGURES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.figure:
        figure = FIGURES[options.figure](options.tokenizer, options.data)
        figure["memory_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20)
        print(json.dumps(figure))
        return
    from tunesmith import pocket

    tokenizer = options.tokenizer or str(pocket.folder())
    names = [name for name in FIGURES if options.only is None or options.only in name]
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.jsonl"
        write_rows(Path(options.data) if options.data else None, options.rows, rows)
        if "prepare, warm" in names:
            run("prepare, warm", tokenizer, str(rows), folder)  # fills the cache
        for _ in range(options.runs):
            for name in names:
                runs[name].append(run(name, tokenizer, str(rows), folder))
    # Trained tokens stand in the record: some of TRL's templates train the line break behind the end of a turn, ours do not.
    if len(told := {(found[-1]["rows"], found[-1]["tokens"]) for found in runs.values() if "rows" in found[-1]}) > 1:
        raise SystemExit(f"the sides made different rows and tokens: {told}; no speed is shown")
    record = {
        "rows": options.rows,
        "tokenizer": Path(tokenizer).name,
        "data": Path(options.data).name if options.data else "support tickets",
        "machine": {"cores": CORES, "platform": platform.platform(terse=True), "python": platform.python_version()},
        "versions": {name: version(name) for name in ("tokenizers", "transformers", "datasets", "trl", "numpy")},
        "figures": {name: {**found[-1], "seconds": median(one["seconds"] for one in found)} for name, found in runs.items()},
        "seconds": {name: [round(one["seconds"], 3) for one in found] for name, found in runs.items()},
    }
    for name, figure in record["figures"].items():
        speed = (
            f"{figure['rows'] / figure['seconds']:9,.0f} rows/s {figure['tokens'] / figure['seconds']:12,.0f} tokens/s"
            if "rows" in figure
            else ""
        )
        print(f"{name:<32}{figure['seconds']:8.2f} s {figure['memory_gb']:6.2f} GB {speed}")
    if options.out:
        options.out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""Put the weights of a pre-training run into the package, in bf16, with the record of how they were made.

python scripts/pocket/bundle.py --run runs/pocket
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tunesmith.core.files import file_hash, write_json
from tunesmith.pocket import folder

LIMIT = 8_000_000


def weights(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a model file in bf16, the tied head left out. Raises SystemExit when one is not finite."""
    tensors = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in load_file(path).items() if name != "lm_head.weight"}
    broken = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if broken:
        raise SystemExit(f"{path}: not finite: {', '.join(broken)}")
    return tensors


def record(run: Path, corpus: Path) -> dict[str, object]:
    """What was trained on what, for how long, with which result."""
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = [step["eval/loss"] for step in steps if "eval/loss" in step]
    return {
        "corpus": {path.name: file_hash(path) for path in sorted(corpus.glob("*.jsonl"))},
        "steps": max(step["step"] for step in steps),
        "tokens": sum(step.get("tokens", 0) for step in steps),
        "validation_loss": losses[-1] if losses else None,
        "torch": torch.__version__,
        "recipe": (run / "recipe.yaml").read_text(encoding="utf-8").splitlines(),
    }


def main() -> None:
    """Write model.safetensors and training.json beside the configuration, and check the size of the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/pocket"))
    parser.add_argument("--corpus", type=Path, default=Path("runs/pocket-corpus"))
    options = parser.parse_args()
    target = folder() / "model.safetensors"
    save_file(weights(options.run / "final" / "model.safetensors"), target, metadata={"format": "pt"})
    write_json(folder() / "training.json", record(options.run, options.corpus) | {"weights": file_hash(target)})
    size = sum(path.stat().st_size for path in folder().iterdir())
    print(f"{folder()}: {size} bytes")
    if size > LIMIT:
        raise SystemExit(f"the folder is larger than {LIMIT} bytes")


if __name__ == "__main__":
    main()

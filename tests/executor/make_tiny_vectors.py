"""Write vectors/tiny_logits.json: logits of the tiny models by transformers, in fp32.

python -m tests.executor.make_tiny_vectors          from the repository root, with the [torch] extra
"""

from __future__ import annotations

import json
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any

from tests.executor.tiny import VARIANTS, write_tiny_model

# Imported so that the type checkers do not need what is an extra.
torch: Any = import_module("torch")
transformers: Any = import_module("transformers")

VECTORS = Path(__file__).with_name("vectors") / "tiny_logits.json"
TOKENS = [1, 120, 7, 200, 33, 90, 91, 7, 150, 260, 4, 99, 12, 55, 120, 201, 18, 77, 240, 3] * 5
"""More than one chunk of prefill."""


def logits_of(directory: Path, tokens: list[int]) -> Any:  # noqa: ANN401 - of torch
    """Logits of transformers after each of the tokens, shape (tokens, vocabulary)."""
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.inference_mode():
        return model(torch.tensor([tokens])).logits[0].numpy()


def main() -> None:
    """Compute all variants."""
    variants: dict[str, list[float]] = {}
    for name, changes in VARIANTS.items():
        with tempfile.TemporaryDirectory() as folder:
            last = logits_of(write_tiny_model(Path(folder), changes=changes), TOKENS)[-1]
        variants[name] = [float(f"{value:.6g}") for value in last]
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    VECTORS.write_text(json.dumps({"versions": versions, "tokens": TOKENS, "last_logits": variants}) + "\n")


if __name__ == "__main__":
    main()

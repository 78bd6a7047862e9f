"""Write vectors/greedy_smollm2.json: prompts, their ids and greedy answers by transformers, in fp32, on the CPU.

    python -m tests.executor.make_greedy_vectors MODEL_DIRECTORY     from the repository root, with the [torch] extra

`margin` is the smallest distance between the two largest logits along an answer: what rounding must not exceed.
"""

from __future__ import annotations

import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any, TypeAlias

# Imported so that the type checkers do not need what is an extra.
torch: Any = import_module("torch")
transformers: Any = import_module("transformers")

VECTORS = Path(__file__).with_name("vectors") / "greedy_smollm2.json"
MAX_TOKENS = 64
WANTED = 20
MARGIN_MIN = 1e-3
"""Logits; a hundred times the rounding differences between fp32 implementations."""

Turns: TypeAlias = tuple[tuple[str, str], ...]
"""Roles and contents."""

QUESTIONS = (
    "Write two sentences about the moon, then two about the sun.",
    "Explain photosynthesis to a child.",
    "List five fruits and their colours.",
    "Write a short poem about the sea.",
    "How do I boil an egg?",
    "Tell me a story about a robot who learns to paint.",
    "Give three tips for better sleep.",
    "Summarise the plot of Romeo and Juliet.",
    "Write a Python function that reverses a string, and explain every line.",
    "What causes rain?",
    "Describe a busy market in the morning.",
    "Why is the sky blue?",
    "Write a polite email asking for a day off.",
    "What are the planets of the solar system? One line for each.",
    "Explain what a database index is.",
    "Give a recipe for tomato soup.",
    "Who was Marie Curie?",
    "Compare cats and dogs as pets.",
    "Qu'est-ce que la photosynthèse ? Répondez en français.",
    "用中文介绍一下长城。",
    "Continue: 1, 1, 2, 3, 5, 8, 13, 21,",
    "What do the emoji 🚀🌍👩‍👩‍👧 mean?",
    "   Spaces   before,\tbetween\n\nand after   ",
    "How does a bicycle stay upright?",
)
CONVERSATIONS: tuple[Turns, ...] = (
    (("system", "You answer like a pirate."), ("user", "How do ships stay afloat?")),
    (
        ("user", "Name a river in Africa."),
        ("assistant", "The Nile."),
        ("user", "Tell me more about it, in a long paragraph."),
    ),
    (
        ("system", "Be brief."),
        ("user", "Hello!"),
        ("assistant", "Hi. What can I do for you?"),
        ("user", "Write a long list of things to pack for a hike."),
    ),
    *((("user", question),) for question in QUESTIONS),
)


def answer(model: Any, tokenizer: Any, turns: Turns) -> dict[str, Any]:  # noqa: ANN401 - of transformers
    """One conversation with its greedy answer."""
    messages = [{"role": role, "content": content} for role, content in turns]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    with torch.inference_mode():
        out = model.generate(
            torch.tensor([prompt]),
            max_new_tokens=MAX_TOKENS,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    margins = [float(top[0] - top[1]) for top in (row[0].topk(2).values for row in out.logits)]
    tokens = out.sequences[0, len(prompt) :].tolist()
    return {"messages": messages, "prompt": prompt, "answer": tokens, "margin": float(f"{min(margins):.3g}")}


def greedy_answers(directory: Path, wanted: int = WANTED) -> list[dict[str, Any]]:
    """The first conversations whose answers are long and clear enough to compare."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    cases: list[dict[str, Any]] = []
    for turns in CONVERSATIONS:
        case = answer(model, tokenizer, turns)
        if len(case["answer"]) == MAX_TOKENS and case["margin"] >= MARGIN_MIN:
            cases.append(case)
        if len(cases) == wanted:
            return cases
    msg = f"only {len(cases)} conversations have long and clear answers"
    raise SystemExit(msg)


def main() -> None:
    """Compute and write."""
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    document = {"versions": versions, "max_tokens": MAX_TOKENS, "cases": greedy_answers(Path(sys.argv[1]))}
    VECTORS.write_text(json.dumps(document, ensure_ascii=False, indent=1) + "\n")


if __name__ == "__main__":
    main()

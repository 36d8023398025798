"""Perplexity of SmolLM2-135M without 8 of its 30 layers, by every way of choosing them; model and texts are those of
`bench_perplexity.py`, which says how to get them.

    python scripts/bench_perplexity.py out/bench-perplexity --rows none
    python scripts/bench_layers.py out/bench-perplexity
"""

import argparse
from pathlib import Path
from typing import Any

from bench_perplexity import SPLITS, evaluation, measure, print_row, python_pieces
from transformers import AutoTokenizer

from evla_cli import pipeline
from evla_cli.choosing import ChoiceOptions
from evla_cli.progress import set_quiet
from evla_cli.refitting import RefitOptions
from evla_cli.settings import LAYER_METHODS

ROWS: dict[str, dict[str, Any]] = {
    "8 layers": {},
    "8 layers, 25 % of rows: activation": {"mlp_prune_ratio": 0.25, "mlp_method": "activation"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--licence", type=Path, default=Path("/usr/share/common-licenses/GPL-3"))
    parser.add_argument("--split", choices=SPLITS, default="head", help="As given to bench_perplexity.py.")
    parser.add_argument("--seed", type=int, default=0, help="As given to bench_perplexity.py.")
    parser.add_argument("--methods", nargs="+", default=LAYER_METHODS, choices=LAYER_METHODS)
    parser.add_argument("--num-samples", type=int, help="To choose layers on; refit uses all.")
    arguments = parser.parse_args()
    set_quiet(True)
    model, samples = arguments.out / "model", arguments.out / "calibration.jsonl"
    tokenizer = AutoTokenizer.from_pretrained(model)
    python = python_pieces(tokenizer, arguments.split, arguments.seed)
    evaluated = evaluation(tokenizer, python, arguments.licence)
    importance, pruned = arguments.out / "importance.json", arguments.out / "pruned"
    if not importance.is_file():
        pipeline.analyze_to_file(model, samples, importance)
    print_row("", list(evaluated))
    for method in arguments.methods:
        choice = None if method == "cosine" else ChoiceOptions(method, "hidden", samples, arguments.num_samples)
        plan = pipeline.prune(model, pruned, importance=importance, num_drop=8, choice=choice, dry_run=True).plan
        print(f"{method}: {', '.join(map(str, plan.dropped_layers))}")
        for name, options in ROWS.items():
            for refit in (None, RefitOptions(samples)):
                pipeline.prune(
                    model,
                    pruned,
                    importance=importance,
                    drop_ids=plan.dropped_layers,
                    refit=refit,
                    overwrite=True,
                    **options,
                )
                print_row(name + (", refit" if refit else ""), measure(pruned, evaluated))


if __name__ == "__main__":
    main()

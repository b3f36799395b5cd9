"""Export: `python -m iic_dist.export --run runs/NAME --format onnx` writes a run for use without this package."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from iic_dist.config.console import Parser, errors_in_one_line, log_to_console, run_option, say
from iic_dist.distributed import Place
from iic_dist.prediction import clusterer
from iic_dist.prediction.export import FORMATS
from iic_dist.prediction.outputs import check_file


def _options() -> argparse.Namespace:
    parser = Parser(prog="python -m iic_dist.export", description="Write a trained run for use without this package.")
    run_option(parser)
    parser.add_argument(
        "--format",
        required=True,
        choices=sorted(FORMATS),
        help="onnx: from uint8 images, or rows of features, to probabilities, needs onnx and onnxscript; safetensors: "
        "the weights and what they belong to, needs safetensors",
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: model.FORMAT in the run's folder")
    return parser.parse_args()


def main() -> None:
    """Export one run."""
    log_to_console(logging.WARNING)
    options = _options()
    path = options.output or options.run / f"model.{options.format}"
    with errors_in_one_line(Place(), system_error=2):
        run = clusterer.load(options.run, "cpu")
        check_file("--output", path)
        FORMATS[options.format](run, path)
        takes, dtype = ("features", "float32") if run.takes_features else ("images", "uint8")
        shape = " x ".join(map(str, run.input_shape))
        say(Place(), f"written: {path} ({takes}: {shape} {dtype}; {run.num_clusters} clusters)")


if __name__ == "__main__":
    main()

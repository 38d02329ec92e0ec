"""Run in a process of its own: what the real sd-scripts makes of a rendered run, as JSON.

Arguments: the checkout, the run's folder.
"""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

from kohaku_wrap.planning.workers.list_options import stand_in_for_torchvision


def main() -> None:
    checkout, run = sys.argv[1:]
    sys.path.insert(0, checkout)
    stand_in_for_torchvision()
    with contextlib.redirect_stdout(sys.stderr):
        document = ask(Path(run))
    json.dump(document, sys.stdout, default=str)


def ask(run: Path) -> dict[str, Any]:
    import sdxl_train_network
    from library import config_util, strategy_sdxl, train_util

    parser = sdxl_train_network.setup_parser()
    sys.argv = ["x", "--config_file", str(run / "trainer.toml"), "--dataset_config", str(run / "dataset.toml")]
    args = train_util.read_config_from_file(parser.parse_args(), parser)
    arrived = dict(vars(args))
    train_util.verify_training_args(args)
    train_util.prepare_dataset_args(args, True)
    sanitizer = config_util.ConfigSanitizer(True, True, args.masked_loss, True)
    blueprint = config_util.BlueprintGenerator(sanitizer).generate(
        config_util.load_user_config(args.dataset_config), args
    )
    dataset = blueprint.dataset_group.datasets[0]
    answer = {"namespace": arrived, "dataset": vars(dataset.params), "subset": vars(dataset.subsets[0].params)}
    if Path(dataset.subsets[0].params.image_dir, "metadata_cache.json").is_file():
        train_util.TokenizeStrategy = strategy_sdxl.SdxlTokenizeStrategy
        group, _ = config_util.generate_dataset_group_by_blueprint(blueprint.dataset_group)
        group.verify_bucket_reso_steps(32)
        answer["batches"] = len(group)
        answer["images"] = group.num_train_images
        answer["buckets"] = sorted(
            [*resolution, len(bucket)]
            for each in group.datasets
            for resolution, bucket in zip(each.bucket_manager.resos, each.bucket_manager.buckets, strict=True)
            if bucket
        )
    return answer


if __name__ == "__main__":
    main()

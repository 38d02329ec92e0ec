"""sd-scripts as it is, for comparison: only what the demo on a CPU needs is seen to, no part of its training.

That is: the sizes of the demo's model, a torchvision that imports, several processes on a CPU.

Run as `python -m kohaku_wrap.training.engines.sd_scripts.plain` with the arguments of `sdxl_train_network.py`.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

from kohaku_wrap.trainer.checkout import find_checkout
from kohaku_wrap.training.engines.sd_scripts.worker import enter_checkout


def main() -> None:
    """Train with the trainer's own script, its loop, dataset and states untouched."""
    checkout = find_checkout()
    enter_checkout(checkout)
    import sdxl_train_network
    from accelerate import Accelerator

    from kohaku_wrap.training.engines.sd_scripts.cpu_processes import leave_frozen_modules
    from kohaku_wrap.training.engines.sd_scripts.objects import find_object, replace_object
    from kohaku_wrap.training.engines.sd_scripts.tiny_sizes import change_sizes

    parser = sdxl_train_network.setup_parser()
    args = find_object("read_config_from_file")(args=parser.parse_args(), parser=parser)
    change_sizes(Path(args.pretrained_model_name_or_path))
    replace_object(Accelerator, leave_frozen_modules(Accelerator))
    script = checkout.path / "sdxl_train_network.py"
    sys.argv[0] = str(script)
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main()

"""The packages that an engine's worker imports, as one JSON list: `list_imports.py builtin` or `sd-scripts`."""

from __future__ import annotations

import importlib
import json
import sys
from importlib import metadata

from kohaku_wrap.trainer.engines import find_engine
from kohaku_wrap.trainer.installed import plain_name

ENGINES = {
    "builtin": ("kohaku_wrap.training.engines.builtin.loop", "lycoris.kohya"),
    "sd-scripts": ("sdxl_train_network", "lycoris.kohya", "kohaku_wrap.training.engines.sd_scripts.run"),
}


COMPUTES_NOTHING = frozenset(
    {
        *("certifi", "charset-normalizer", "httpx", "huggingface-hub", "idna", "requests", "urllib3"),  # the network
        *("click", "pygments", "rich", "tqdm"),  # what is printed
        *("filelock", "packaging", "protobuf", "pyyaml", "setuptools", "typing-extensions"),
        *("jinja2", "markupsafe", "mpmath", "networkx", "sympy"),  # torch's compiler, which is refused
        "kohaku-wrap",
    }
)
"""What may have another version in the next attempt, as it computes nothing that is trained."""


def main(engine: str) -> None:
    if engine == "sd-scripts":
        from kohaku_wrap.trainer.checkout import find_checkout
        from kohaku_wrap.training.engines.sd_scripts.worker import enter_checkout

        enter_checkout(find_checkout())
    for module in ENGINES[engine]:
        importlib.import_module(module)
    names = {module.partition(".")[0] for module in sys.modules}
    found = set()
    folders = [str(folder) for folder in find_engine(engine).package_folders()]
    for package in (*metadata.distributions(), *metadata.distributions(path=folders)):
        modules = {file.parts[0].removesuffix(".py") for file in package.files or ()}
        if names & modules:
            found.add(plain_name(package.metadata["Name"]))
    print(json.dumps(sorted(found)))


if __name__ == "__main__":
    main(sys.argv[1])

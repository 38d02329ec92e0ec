"""How `accelerate launch` joins machines, from its own parser, printed as one JSON document.

Run as `python -m kohaku_wrap.planning.workers.list_launch_options launch`. `options` are those that say how machines
find each other, `others` the names of all the rest.
"""

from __future__ import annotations

from typing import Any

from accelerate.commands.launch import launch_command_parser

from kohaku_wrap.planning.workers.list_options import describe_action
from kohaku_wrap.processes import answer

GROUP = "Distributed GPUs"
"""accelerate's own heading."""


def list_launch_options() -> dict[str, Any]:
    """Those that say how machines find each other, and the names of all others."""
    parser = launch_command_parser()
    joining = [group for group in parser._action_groups if group.title == GROUP]
    actions = {action.dest: action for action in parser._actions}
    names = {action.dest for group in joining for action in group._group_actions} | {"num_machines"}
    return {
        "options": {name: describe_action(actions[name]) for name in sorted(names)},
        "others": sorted(set(actions) - names),
    }


if __name__ == "__main__":
    answer(list_launch_options)

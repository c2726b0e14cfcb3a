"""Ends train before torch is imported, which takes a second, if there is nothing to do or a request must be refused."""

import sys

from stage.output import print_error, say
from stage.process import Failure, exit_on_failure
from training import plan, settings
from training.data import read_data
from training.details.lock import Busy, volume_lock
from training.details.needs import check_limits


def end_unless_there_is_work() -> None:
    """End the process if there is nothing to do, after a look at the data, or if what is requested must be refused."""
    args, requested = settings.parse_args()
    if settings.is_node():
        return
    with exit_on_failure("train"):
        if args.dry_run:
            check_limits(plan.dry_run(requested).settings)
            return
        args.model.mkdir(parents=True, exist_ok=True)
        todo = plan.decide(requested, args.fresh, args.model)
        if todo.action != "nothing":
            try:
                with volume_lock(args.model):  # to know whether another training is at work; main() locks it again
                    check_limits(todo.settings)
                    return
            except Busy as busy:
                todo = plan.beside_another(busy, requested, args.fresh, args.model)
        try:
            data = read_data(args.data)  # the next stages need the data but cannot write to its folder
        except Failure as failure:
            print_error(f"train: warning: {failure}")
        else:
            plan.check_data(todo, data.sha256, args.model)
        say(f"train: {todo.message}")
    sys.exit(0)

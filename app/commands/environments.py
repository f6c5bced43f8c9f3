"""What environments ask, and whether they can be trusted."""

from app.options import Model
from modules.errors import UserError


def environments(names: str, *, model: Model | None = None, problems: int = 20, seed: int = 0) -> int:
    """Show a problem of each environment, and test that it pays for right answers and for nothing else.

    Of each of some problems the answer, and the environment's own worked solution, must be paid 1; an empty reply, near
    misses and the answer with junk around it must be paid 0; no checker may raise or take too long. Exit code 1 if an
    environment fails. Run it on an environment of your own before a model learns from it.

    Args:
        names: Names of environments, separated by commas: reasoning_gym/FAMILY (* and ? stand for any characters), a
            YAML file with environments, or names in the run that made --model.
        model: MODEL whose run names environments.
        problems: Problems of each environment that are tried.
        seed: Seed of the problems.

    Raises:
        UserError: there is no such environment.

    Example:
        python -m app environments reasoning_gym/chain_sum,reasoning_gym/number_sorting
    """
    if problems < 1:
        raise UserError(f"--problems: {problems} must be at least 1")
    from app.evaluation.environments import find_environments
    from datamodules.environments.pool import Pool
    from datamodules.environments.self_test import self_test
    from modules.checkpoints.source import open_model

    definitions = find_environments(names, {} if model is None else open_model(model).facts.get("run", {}))
    failed = 0
    with Pool(definitions) as pool:
        for name in definitions:
            try:
                found = self_test(pool, name, problems, seed)
            except UserError as error:
                print(f"{name}: cannot be used: {str(error).removeprefix(f'environments.{name}: ')}", flush=True)
                failed += 1
                continue
            print(f"{name}: {'FAILED' if found.faults else 'passed'}, {len(found.problems)} problems")
            print(f"  for example {found.problems[0].text!r} -> {found.problems[0].answer!r}")
            told = [f"  fault: {fault}" for fault in found.faults] + [f"  note: {note}" for note in found.notes]
            print("\n".join(told), end="\n" * bool(told), flush=True)
            failed += bool(found.faults)
    print(f"{len(definitions) - failed:,} of {len(definitions):,} environments passed")
    return int(failed > 0)

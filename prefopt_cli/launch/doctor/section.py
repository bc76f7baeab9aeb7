"""One section in this process: `python -m prefopt_cli.launch.doctor.section NAME` prints a finding a line, in JSON.

What libraries print goes to standard error, so that it cannot be taken for findings.
"""

import json
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from itertools import chain

from prefopt_cli.errors import PrefoptError
from prefopt_cli.launch.doctor.finding import Finding, in_brief, note, problem

TORCH = "pip install --force-reinstall torch (then prefopt again: what it asks for must fit)"


def section(name: str, arguments: Sequence[str] = ()) -> Iterator[Finding]:
    """The findings of a section, one after the other.

    Args:
        name: versions, machine, disks, hub, devices, quantization, processes or recipe.
        arguments: of recipe, its path and overrides; of processes, quick.
    """
    if name == "versions":
        from prefopt_cli.launch.doctor.versions import versions

        return versions()
    if name == "machine":
        from prefopt_cli.launch.doctor.machine import machine

        return machine()
    if name == "disks":
        from prefopt_cli.launch.doctor.disk import disks

        return disks()
    if name == "hub":
        from prefopt_cli.launch.doctor.hub import hub

        return hub()
    if name == "devices":
        try:
            from prefopt_cli.launch.doctor.attention import attention
            from prefopt_cli.launch.doctor.devices import devices
        except Exception as error:  # libraries of the machine that do not fit are told of in many ways
            return iter([problem(f"torch cannot be imported: {in_brief(error)}", TORCH)])
        return chain(devices(), attention())
    if name == "quantization":
        from prefopt_cli.launch.doctor.quantization import quantization

        return quantization()
    if name == "processes":
        from prefopt_cli.launch.doctor.processes import processes

        return processes(quick="quick" in arguments)
    if name == "recipe":
        from prefopt_cli.launch.doctor.of_recipe import of_recipe

        return of_recipe(arguments[0], arguments[1:])
    raise ValueError(f"there is no section {name!r}")


def main() -> None:
    """Print what is found as soon as it is found: what comes later may hang."""
    warnings.simplefilter("ignore")
    findings = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    try:
        for finding in section(sys.argv[1], sys.argv[2:]):
            print(json.dumps(finding.to_dict()), file=findings, flush=True)
    except PrefoptError as error:
        said = note(str(error), "put that right, then run `prefopt doctor` again")
        print(json.dumps(said.to_dict()), file=findings, flush=True)
    except Exception as error:
        print(in_brief(error), file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()

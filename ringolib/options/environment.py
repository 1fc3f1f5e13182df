"""The environment variables of this program: each option may be given as RINGOEXP_NAME, and flags win.

A Kubernetes pod may have variables of the same names. For a Service called `ringoexp`, Kubernetes sets
RINGOEXP_PORT=tcp://ADDRESS:PORT, RINGOEXP_SERVICE_HOST and others. They are ignored.
"""

import re
from collections.abc import Mapping

from ringolib.net.credentials import TOKEN_VARIABLE
from ringolib.options.nearest import find_nearest, suggest
from ringolib.options.table import OPTIONS, VARIABLE_PREFIX
from ringolib.storage.clickhouse.url import PASSWORD_VARIABLE

SECRET_VARIABLES = (TOKEN_VARIABLE, PASSWORD_VARIABLE)
"""Variables with a secret, which no flag may have: other users can read the command line."""
OTHER_VARIABLES = (
    *SECRET_VARIABLES,
    *("RINGOEXP_SEED", "RINGOEXP_ONLY", "RINGOEXP_SECONDS", "RINGOEXP_NODE_MODULES", "RINGOEXP_NO_SKIPS"),
)
"""Variables that are no options: the secrets, and the variables of the tests."""
MISSPELT_RATIO = 0.75
"""How similar to a variable's name another one must be to count as misspelt: `difflib.SequenceMatcher.ratio`."""
_NAMES = [name.removeprefix(VARIABLE_PREFIX) for name in (*(option.variable for option in OPTIONS), *SECRET_VARIABLES)]
_SERVICE_NAME = re.compile(rf"{VARIABLE_PREFIX}(\w+_)?(SERVICE_(HOST|PORT\w*)|PORT_\d+_\w+)")
_SERVICE_ADDRESS = re.compile(r"(tcp|udp|sctp)://\S+")


def given_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the texts of the options that the environment sets, by the options' long names."""
    variables = _own_variables(environ)
    return {option.long: variables[option.variable] for option in OPTIONS if option.variable in variables}


def find_misspelt(environ: Mapping[str, str]) -> str | None:
    """Return an error for the first variable whose name is nearly that of an option or of a secret, or None.

    It is an error, as a misspelt flag is: otherwise a server might run without the token that it was given.
    """
    for name, hint in strange_variables(environ):
        if find_nearest(name.removeprefix(VARIABLE_PREFIX), _NAMES, MISSPELT_RATIO):
            return f"variable {name} is not an option{hint}"
    return None


def strange_variables(environ: Mapping[str, str]) -> list[tuple[str, str]]:
    """Return each variable with our prefix that nothing reads, and a suggestion, which may be empty."""
    strange = sorted(_own_variables(environ).keys() - {option.variable for option in OPTIONS} - {*OTHER_VARIABLES})
    return [(name, suggest(name.removeprefix(VARIABLE_PREFIX), _NAMES, VARIABLE_PREFIX)) for name in strange]


def _own_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables with our prefix. Leave out the ones that Kubernetes sets for a Service."""
    return {
        name: value
        for name, value in environ.items()
        if name.startswith(VARIABLE_PREFIX)
        and not _SERVICE_NAME.fullmatch(name)
        and not (name.endswith("_PORT") and _SERVICE_ADDRESS.fullmatch(value))
    }

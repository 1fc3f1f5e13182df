"""The options of a server: one table, the command line and the environment that set them, and their conflicts."""

from ringolib.options.command_line import COMMANDS, EXIT_USAGE, read_arguments
from ringolib.options.conflicts import Role, find_conflict
from ringolib.options.environment import strange_variables
from ringolib.options.table import OPTIONS, Option, Settings

__all__ = [
    "COMMANDS",
    "EXIT_USAGE",
    "OPTIONS",
    "Option",
    "Role",
    "Settings",
    "find_conflict",
    "read_arguments",
    "strange_variables",
]

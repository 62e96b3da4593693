"""How the scripts say on the command line what they do."""

import argparse


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The text as it was written, and behind every option its default where it has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False or action.default == []:
            return action.help
        if isinstance(action.default, list | tuple):
            return f"{action.help} (default: {' '.join(map(str, action.default))})"
        return super()._get_help_string(action)


def command_line(what: str | None) -> argparse.ArgumentParser:
    """A parser whose help begins with what the script does, its docstring."""
    return argparse.ArgumentParser(description=what, formatter_class=_Help)

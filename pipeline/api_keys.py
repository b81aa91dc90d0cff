"""API keys come from the environment; no option, file or error contains one."""

import os
import re


def key_from_environment(variable: str, option: str) -> str:
    """The key in the environment variable that an option names; empty where it names none.

    ValueError, which shows neither key nor variable, if that is no valid name, or the variable is
    not set or holds no key.
    """
    if not variable:
        return ""
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", variable):  # the key itself?
        raise ValueError(
            f"{option} is not the name of an environment variable; "
            "export the key under some name and give that name here."
        )
    key = os.environ.get(variable, "").strip()
    if not re.fullmatch(r"[!-~]+", key):
        raise ValueError(
            f"the environment variable that {option} names is not set or holds no key; "
            f"export it, or leave {option} empty for a server without keys."
        )
    return key

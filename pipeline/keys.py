"""Keys of others come from the environment; no option, file or error holds one."""

import os
import re


def key_from_environment(variable: str, option: str) -> str:
    """The key in an environment variable that an option names; nothing where it names none.

    ValueError, which shows neither key nor variable, for what is not a name, a variable that is not
    set, or holds no key.
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

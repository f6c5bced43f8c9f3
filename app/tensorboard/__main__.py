"""TensorBoard that opens on our page (`layout.py`): `python -m app.tensorboard --logdir runs`.

It opens on the first tab of its list of plugins, and has no option for that. Plain `tensorboard --logdir runs` has the
same curves in its own tabs.
"""

import sys

from tensorboard import default, program
from tensorboard.plugins import base_plugin

from app.tensorboard.plugin import RunPage


def plugins() -> list[type]:
    """Return TensorBoard's plugins, behind our own."""
    return [RunPage, *default.get_plugins()]


def main() -> None:
    """Serve with TensorBoard's own options until interrupted."""
    server = program.TensorBoard(plugins=plugins())
    try:
        server.configure(sys.argv)
    except base_plugin.FlagsError as error:
        sys.exit(f"error: {error}")
    sys.exit(server.main())


if __name__ == "__main__":
    main()

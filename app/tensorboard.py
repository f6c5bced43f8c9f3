"""TensorBoard that opens on our page of charts (`callbacks/dashboard.py`): `python -m app.tensorboard --logdir runs`.

Plain `tensorboard --logdir runs` shows the same, two tabs further (Custom Scalars). TensorBoard opens on the first tab
of its list of plugins, and has no option for it.
"""

import sys

from tensorboard import default, program
from tensorboard.plugins import base_plugin
from tensorboard.plugins.custom_scalar.custom_scalars_plugin import CustomScalarsPlugin


def plugins() -> list[type]:
    """Return TensorBoard's plugins, ours to open on first."""
    others = [plugin for plugin in default.get_plugins() if plugin is not CustomScalarsPlugin]
    return [CustomScalarsPlugin, *others]


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

"""Makes the data that a config's `world` section names: the built-in world or unpacked photos."""

from clipn.config.schema import WorldConfig
from clipn.runtime.distributed import barrier, is_main
from clipn.toy.generate import World, make_toy
from clipn.toy.photos import unpack_photos


def make_world(world: WorldConfig) -> None:
    """Make `world.name` in `world.root`, unless it exists; do nothing for `name: null`.

    Under many ranks rank 0 does the work, and the others wait. Raises ValueError where world.root holds something else,
    FileNotFoundError where world.source does not exist.
    """
    if world.name == "toy" and is_main():
        make_toy(world.root, World(**{name: getattr(world, name) for name in World.__dataclass_fields__}))
    elif world.name == "photos" and is_main():
        unpack_photos(world.source, world.root)
    barrier()

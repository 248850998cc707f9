"""Process topology, process groups and seeding."""

from hcx.dist.seeding import derived_generator, derived_seed, seed_everything
from hcx.dist.topology import Topology, destroy_process_group, init_process_group, process_environment

__all__ = [
    "Topology",
    "derived_generator",
    "derived_seed",
    "destroy_process_group",
    "init_process_group",
    "process_environment",
    "seed_everything",
]

"""Several honest hosts on one Linux machine: namespaces, rate limits, delay, loss, CPU and memory limits.

spec = load_spec(Path("three.toml"))
with Lab(spec) as lab:
    lab.run("fast", ["ping", "-c1", lab.address("slow")])
"""

from bench.lab.lab import Lab, head_options, join_options, pair_hosts, why_not
from bench.lab.spec import HostSpec, LabError, LabSpec, LinkSpec, load_spec, parse_spec

__all__ = [
    "HostSpec",
    "Lab",
    "LabError",
    "LabSpec",
    "LinkSpec",
    "head_options",
    "join_options",
    "load_spec",
    "pair_hosts",
    "parse_spec",
    "why_not",
]

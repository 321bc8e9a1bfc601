"""A script: a Ray cluster of a head and two nodes on this machine, with the server on it.

Told "kill" on its standard input it ends one of the two nodes with everything on it, as if the machine were gone.
"""

import json
import sys

import ray
from ray.cluster_utils import Cluster

from lenskit.server.config import Config
from lenskit.server.on_ray import deploy

STORE = 100 * 2**20  # bytes of Ray's own object store, of each node

if __name__ == "__main__":
    config = Config(**json.loads(sys.argv[1]))
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 0, "object_store_memory": STORE, "include_dashboard": False},
    )
    nodes = [cluster.add_node(num_cpus=1, object_store_memory=STORE) for _ in range(2)]
    ray.init(address=cluster.address, log_to_driver=False)
    deploy(config)
    print("ready", flush=True)
    for line in sys.stdin:
        if line.strip() == "kill":
            cluster.remove_node(nodes[0], allow_graceful=False)
            print("killed", flush=True)
    ray.shutdown()
    cluster.shutdown()

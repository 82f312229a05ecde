"""torchrun for the processes of one machine, for launch/torchrun.sh: nothing listens beyond loopback.

    python launch/local_torchrun.py --nproc-per-node N -m MODULE [ARGUMENT ...]

`torchrun --standalone` meets through a TCP store that listens on every interface. Here the launcher meets itself in a
file, and its processes meet on loopback, at a port that the first one takes and tells in the same folder.
"""

import os
import sys
import tempfile

from torch.distributed.run import main

if __name__ == "__main__":
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    with tempfile.TemporaryDirectory(prefix="dash-dist-") as folder:
        os.environ["DASH_DIST_MEETING"] = folder
        # A file grows by every sign of life.
        conf = "store_type=file,keep_alive_interval=60"
        meeting = ["--rdzv-backend", "c10d", "--rdzv-conf", conf, "--rdzv-endpoint", f"{folder}/store"]
        main([*meeting, "--local-addr", "127.0.0.1", *sys.argv[1:]])

#!/usr/bin/env python3
"""Compiles a recipe's train and decode step for TPUs that are not there, and says whether they fit and how fast
they could be:

    pip install -c constraints.txt ".[tpu]"
    python launch/aot_compile.py llama2_7b_mp20 --topology v5e:4x4
"""

import os
import sys

# Before JAX starts: this machine's CPU is what runs, and nobody asks a metadata server which TPU this is.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no chip is taken: another process may use libtpu, too
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")  # any; only silences a warning, --topology decides
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from jaxcrystal.aot.command import main

sys.exit(main())

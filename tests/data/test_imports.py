"""What the data sets need at import."""

import subprocess
import sys


def test_data_sets_need_no_checkpoints():
    program = "import sys, ccnet_d2.data; sys.exit('ccnet_d2.checkpoint' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)

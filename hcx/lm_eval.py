"""`python -m hcx.lm_eval`: lm-eval's own command with `--model hcx`, hcx's tasks, and BCQ for `--model hf`.

Example:
    python -m hcx.lm_eval run --model hcx --model_args pretrained=MODEL --tasks hcx_kmmlu_dev225
"""

from __future__ import annotations

import sys

from hcx.errors import HcxError
from hcx.evals.command import main

if __name__ == "__main__":
    try:
        main()
    except HcxError as error:
        sys.stderr.write(f"hcx: {error}\n")
        sys.exit(2)

"""Recipe -> running trainer -> run folder."""

import os

# TRL's trainers report their use to the hub unless told not to, and the hub's client reads this when it is imported.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

"""Names of the environment variables by which the launcher and its processes speak."""

FOLDER = "PREFOPT_LAUNCH"
"""The folder in which workers leave their failures; set in the processes that prefopt's own launcher starts."""

AGENT = "PREFOPT_LAUNCH_AGENT"
"""The process id of torchrun's agent, which is a worker's parent as long as it lives."""

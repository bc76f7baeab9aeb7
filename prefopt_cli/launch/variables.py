"""Names of the environment variables by which the launcher and its processes speak."""

FOLDER = "PREFOPT_LAUNCH"
"""The folder in which workers leave their failures; set in the processes that prefopt's own launcher starts."""

LAUNCHER = "PREFOPT_LAUNCHER"
"""The process id of the launcher, which is the parent of torchrun's agent as long as it lives."""

AGENT = "PREFOPT_LAUNCH_AGENT"
"""The process id of torchrun's agent, which is a worker's parent as long as it lives."""

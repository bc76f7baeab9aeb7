"""One process, several, several machines: how a run is started; and what the machine can do."""

"""What this machine can do, found out by trying it: one module for each subject, each run in a process of its own."""

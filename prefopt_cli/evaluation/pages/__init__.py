"""The reports: one self-contained HTML page for an evaluation or a comparison."""

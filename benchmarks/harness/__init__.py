"""Times a cell after its correctness gate: runs, rulers, peers, verdicts and reports."""

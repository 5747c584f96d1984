"""Measures Tables 1 and 2 of the Accordion paper: two levels of compression, and Accordion, which chooses among them.

    python benchmarks/evidence/accordion.py --seeds 1      # in about 2 minutes on 2 cores
    python benchmarks/evidence/accordion.py                # three seeds

4 workers, whose links let 1 Gbit/s through. Accordion decides anew each epoch of the CNN and each quarter epoch of the
LSTM, with the paper's threshold of 0.5.
"""

from runs import measure, parse

METHODS = {
    "cnn": ["rank-2", "rank-1", "accordion-2-1", "top-k-99%", "top-k-10%", "accordion-top-k"],
    "lstm": ["rank-4", "rank-1", "accordion-4-1"],
}

if __name__ == "__main__":
    measure("accordion", parse(__doc__), METHODS)

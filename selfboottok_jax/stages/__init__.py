"""The three trainings: the tokenizer, its larger local aligner, the generator.

Each stage has its loss, what it is built from a configuration, how its state
starts and what is measured while it trains; `train` runs any of them.
"""

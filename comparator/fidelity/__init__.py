"""How far a column is from the reference: KL divergence, perplexity, weight error, adapter drift, sensitivity,
verdicts.
"""

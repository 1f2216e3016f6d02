"""Keep the results of a run: states, expectations, evidence, and the HTML page."""

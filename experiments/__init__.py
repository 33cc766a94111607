"""One file a table or figure; results as JSON in ``results/``, from which tables and figures are made."""

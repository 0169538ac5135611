"""Published claims put to the test: a plan of experiments, a queue that runs it, a ledger, and pages made of both."""

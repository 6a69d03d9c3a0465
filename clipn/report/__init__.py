"""Tables, figures and report.html of an evaluation."""

"""What a run looked like: reading its directory, intervals, the stage table and the HTML report."""

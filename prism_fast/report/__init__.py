"""Reports of a run: its directory read, intervals, the stage table and the HTML page."""

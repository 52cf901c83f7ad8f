"""Reports: from a folder of runs to statistics, tables, pictures and a page."""

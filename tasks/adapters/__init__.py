"""One vendor, or vendor pair, a file; nothing here knows Prefect."""

"""Triton kernels, one file per stem; functions and argument order are those of
`reference/<stem>.py`.

`_rows.py` holds what the kernels share on the device, `_launch.py` the launch tables and the host
side, `_offline.py` compiles every variant for every architecture without a GPU and reads the
compiler's report. Imported lazily by `backends.py`; importing a module here needs triton, but
neither a GPU nor a driver.
"""

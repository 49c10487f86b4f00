"""Which nodes of a cluster get devices."""

from driver import run_driver


async def test_a_head_without_cpus_gets_no_devices():
    printed = await run_driver("""
        import asyncio, json, os, subprocess, sys
        import ray
        from ray.cluster_utils import Cluster

        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        worker = cluster.add_node(num_cpus=1)
        ray.init(address=cluster.address, namespace="kvpool", log_to_driver=False)
        os.environ["RAY_ADDRESS"] = cluster.address

        async def main():
            from kvpool import CachePool

            async with await CachePool.create(name="nodes", devices="host:2x1MiB", page_size="64KiB") as pool:
                async with await pool.request_cache("m", size="64KiB"):
                    pass
                for number in range(2):
                    device = ray.get_actor(f"kvpool/nodes/host-{number}", namespace="kvpool")
                    lives = await device.__ray_call__.remote(lambda _: ray.get_runtime_context().get_node_id())
                    print(number, lives == worker.node_id)

                command = [sys.executable, "-c", "from kvpool.cli import main; main()", "doctor", "--json", "-"]
                done = await asyncio.create_subprocess_exec(*command, stdout=-1, stderr=-1)
                rows = json.loads((await done.communicate())[0])["rows"]
                for node in (cluster.head_node, worker):
                    of_node = [row["check"] for row in rows if f"({node.node_id[:8]})" in row["where"]]
                    print("versions" in of_node, "memory" in of_node)
                await pool.delete()

        asyncio.run(main())
        ray.shutdown()
        cluster.shutdown()
    """)
    assert printed.splitlines() == ["0 True", "1 True", "True False", "True True"]

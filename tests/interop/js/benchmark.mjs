// The workloads of tests/benchmarks/network.py over js-libp2p; tests/benchmarks/network_common.py says what each is.
// Run with --expose-gc. Each host runs what a workload needs, and nothing else.
import { setTimeout as sleep } from 'node:timers/promises'
import { byteStream } from '@libp2p/utils'
import { CID } from 'multiformats/cid'
import { create as createDigest } from 'multiformats/hashes/digest'
import { createHost, dht, pubsub } from './host.mjs'

const {
  payloadBytes, chunkBytes, chunks, seconds, warmUpSeconds, pairs, inFlight, lostSeconds, finds, quietShare, quietSeconds,
  pollSeconds
} = JSON.parse(process.argv[2])
const ECHO = '/bench/echo/1'
const DRAIN = '/bench/drain/1'
const TOPIC = 'bench/offers'
const STREAMS = { maxInboundStreams: 1000, maxOutboundStreams: 1000 }
const RAW = 0x55
const SHA2_256 = 0x12

// Seconds of processor time, of all threads.
function processTime () {
  const { user, system } = process.cpuUsage()
  return (user + system) / 1e6
}

function now () {
  return performance.now() / 1e3
}

function median (values) {
  const sorted = values.toSorted((a, b) => a - b)
  return (sorted[(sorted.length - 1) >> 1] + sorted[sorted.length >> 1]) / 2
}

async function settle () {
  const until = now() + quietSeconds
  while (now() < until) {
    const before = processTime()
    await sleep(500)
    if (processTime() - before < 0.5 * quietShare) return
  }
}

async function rate (step) {
  for (const until = now() + warmUpSeconds; now() < until;) await step()
  const started = processTime()
  let count = 0
  for (const until = now() + seconds; now() < until; count++) await step()
  return count / (processTime() - started)
}

async function openHosts (count, services) {
  const hosts = []
  for (let number = 0; number < count; number++) hosts.push(await createHost({ services }))
  return hosts
}

async function dial (client, server) {
  return client.dial(server.getMultiaddrs()[0])
}

async function connect (client, server) {
  await dial(client, server)
  while ((await client.peerStore.get(server.peerId)).protocols.length === 0) await sleep(1e3 * pollSeconds)
}

async function echo (stream) {
  const bytes = byteStream(stream)
  try {
    while (true) await bytes.write(await bytes.read({ bytes: payloadBytes }))
  } catch {
    await stream.close()
  }
}

async function drain (stream) {
  const bytes = byteStream(stream)
  while (true) {
    for (let left = chunks * chunkBytes; left > 0;) left -= (await bytes.read()).byteLength
    await bytes.write(new TextEncoder().encode('read'))
  }
}

async function measureConnections () {
  const clients = await openHosts(pairs)
  const servers = await openHosts(pairs)
  await settle()
  const durations = []
  const started = processTime()
  for (let number = 0; number < pairs; number++) {
    const begun = performance.now()
    await connect(clients[number], servers[number])
    durations.push(performance.now() - begun)
  }
  return { connections: pairs / (processTime() - started), dial_ms: median(durations) }
}

async function measureStreams () {
  const [client, server] = await openHosts(2)
  await server.handle(ECHO, echo, STREAMS)
  await server.handle(DRAIN, drain, STREAMS)
  await connect(client, server)
  const payload = new Uint8Array(payloadBytes)
  const open = async protocol => byteStream(await client.dialProtocol(server.peerId, protocol, STREAMS))
  const request = async bytes => {
    await bytes.write(payload)
    await bytes.read({ bytes: payloadBytes })
  }

  const one = await open(ECHO)
  const requests = await rate(() => request(one))
  const streams = await rate(async () => {
    const bytes = await open(ECHO)
    await request(bytes)
    await bytes.unwrap().close()
  })
  const bulk = await open(DRAIN)
  const chunk = new Uint8Array(chunkBytes)
  const transfers = await rate(async () => {
    for (let number = 0; number < chunks; number++) await bulk.write(chunk)
    await bulk.read({ bytes: 4 })
  })
  return { requests, streams, megabytes: transfers * chunks * chunkBytes / 1e6 }
}

async function measureGossip (count) {
  const hosts = await openHosts(count, { pubsub })
  for (let left = 0; left < count; left++) {
    for (let right = left + 1; right < count; right++) await dial(hosts[left], hosts[right])
  }
  const counts = new Array(count - 1).fill(0)
  hosts.forEach(({ services }, index) => {
    services.pubsub.subscribe(TOPIC)
    if (index > 0) services.pubsub.addEventListener('message', () => { counts[index - 1]++ })
  })
  await settle()
  const received = () => Math.min(...counts)
  let published = 0
  let lost = 0
  const publish = async seconds => {
    for (const until = now() + seconds; now() < until;) {
      published++
      const data = Buffer.alloc(payloadBytes)
      data.writeUInt32BE(published, payloadBytes - 4)
      await hosts[0].services.pubsub.publish(TOPIC, data)
      const patience = now() + lostSeconds
      while (published - lost - received() >= inFlight) {
        await new Promise(setImmediate)
        if (now() > patience) lost = published - received()
      }
    }
  }
  await publish(warmUpSeconds)
  const [before, started] = [received(), processTime()]
  await publish(seconds)
  return { messages: (received() - before) / (processTime() - started), lost }
}

async function openSwarm (count, services) {
  const [first, ...others] = await openHosts(count, services)
  // One after the other: an upgrade must take no longer than two seconds.
  for (const host of others) await dial(host, first)
  return [first, ...others]
}

function residentBytes () {
  globalThis.gc()
  return process.memoryUsage.rss()
}

async function measureMemory () {
  const open = async count => {
    const hosts = await openHosts(2 * count, { dht, pubsub })
    for (const { services } of hosts) services.pubsub.subscribe(TOPIC)
    for (let number = 0; number < count; number++) await connect(hosts[2 * number], hosts[2 * number + 1])
    return hosts
  }
  const kept = await open(1)
  const before = residentBytes()
  kept.push(...await open(pairs))
  await settle()
  return { memory: (residentBytes() - before) / (2 * pairs) / (1 << 20) }
}

function cidOf (number) {
  return CID.createV1(RAW, createDigest(SHA2_256, new Uint8Array(32).fill(number + 1)))
}

async function first (query, pick) {
  for await (const event of query) {
    const found = pick(event)
    if (found != null) return found
  }
}

async function measureFinds (count) {
  const hosts = await openSwarm(count, { dht })
  await settle()
  for (let number = 0; number < finds; number++) {
    const owner = hosts[number % count].services.dht
    await first(owner.provide(cidOf(number)), () => undefined)
    await first(owner.put(new TextEncoder().encode(`/aci/bench/${number}`), new Uint8Array(256).fill(number)), () => undefined)
  }
  const [newcomer] = await openHosts(1, { dht })
  await dial(newcomer, hosts[0])
  await settle()
  const [providerMs, recordMs] = [[], []]
  let found = 0
  for (let number = 0; number < finds; number++) {
    let begun = performance.now()
    const owner = hosts[number % count].peerId
    found += await first(newcomer.services.dht.findProviders(cidOf(number)), ({ name, providers }) =>
      name === 'PROVIDER' && providers.some(({ id }) => id.equals(owner)) ? 1 : undefined) ?? 0
    providerMs.push(performance.now() - begun)
    begun = performance.now()
    found += await first(newcomer.services.dht.get(new TextEncoder().encode(`/aci/bench/${number}`)), ({ name, value }) =>
      name === 'VALUE' && value.every(byte => byte === number) ? 1 : undefined) ?? 0
    recordMs.push(performance.now() - begun)
  }
  return { provider_ms: median(providerMs), record_ms: median(recordMs), missing: 2 * finds - found }
}

const workloads = {
  connections: measureConnections,
  streams: measureStreams,
  gossip: measureGossip,
  memory: measureMemory,
  finds: measureFinds
}
const [name, count] = process.argv.slice(3)
console.log(JSON.stringify(await workloads[name](Number(count))))
process.exit(0)

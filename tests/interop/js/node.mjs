// A js-libp2p host driven by JSON lines: {"id": 1, "op": "dial", ...} on standard input is answered with
// {"id": 1, "ok": {...}} or {"id": 1, "error": "..."}; gossip arrives as {"topic": ..., "data": ...}. Bytes are hex.
// Arguments: multiaddrs to listen on besides loopback, such as circuits through relays.
import { createInterface } from 'node:readline'
import { lpStream, pipe } from '@libp2p/utils'
import { peerIdFromString } from '@libp2p/peer-id'
import { multiaddr } from '@multiformats/multiaddr'
import { CID } from 'multiformats/cid'
import { create as createDigest } from 'multiformats/hashes/digest'
import { createHost, dht, pubsub } from './host.mjs'

const ECHO = '/test/echo/1'
const TIMEOUT_MS = 10_000
const SHA2_256 = 0x12
const RAW = 0x55

// Streams may go through relays.
const LIMITED = { runOnLimitedConnection: true }

const host = await createHost({ services: { pubsub, dht }, circuits: process.argv.slice(2), relay: true })
await host.handle(ECHO, stream => pipe(stream, stream).catch(() => {}), LIMITED)
host.services.pubsub.addEventListener('message', ({ detail: { topic, data } }) => print({ topic, data: hex(data) }))
print({ peer: String(host.peerId), addresses: host.getMultiaddrs().map(String) })

function print (document) {
  process.stdout.write(JSON.stringify(document) + '\n')
}

function hex (bytes) {
  return Buffer.from(bytes).toString('hex')
}

function bytes (text) {
  return new Uint8Array(Buffer.from(text, 'hex'))
}

// What is provided is named by its SHA-256 digest.
function cid (digest) {
  return CID.createV1(RAW, createDigest(SHA2_256, bytes(digest)))
}

function utf8 (text) {
  return new TextEncoder().encode(text)
}

function options () {
  return { signal: AbortSignal.timeout(TIMEOUT_MS) }
}

// What other nodes answered to messages of one kind in a query; what we hold ourselves is not among it.
async function answers (query, kind) {
  const all = []
  for await (const event of query) {
    if (event.name === 'PEER_RESPONSE' && event.messageName === kind) all.push(event)
  }
  return all
}

const operations = {
  async dial ({ address }) {
    const connection = await host.dial(multiaddr(address), options())
    return { peer: String(connection.remotePeer) }
  },
  async identify ({ peer }) {
    const { protocols, metadata, addresses } = await host.peerStore.get(peerIdFromString(peer))
    const agent = new TextDecoder().decode(metadata.get('AgentVersion'))
    return { protocols, agent, addresses: addresses.map(({ multiaddr }) => String(multiaddr)) }
  },
  async ping ({ peer }) {
    return { ms: await host.services.ping.ping(peerIdFromString(peer), options()) }
  },
  async echo ({ peer, data }) {
    const stream = await host.dialProtocol(peerIdFromString(peer), ECHO, { ...options(), ...LIMITED })
    const frames = lpStream(stream)
    await frames.write(bytes(data), options())
    const answer = await frames.read(options())
    await stream.close()
    return { data: hex(answer.subarray()) }
  },
  async subscribe ({ topic }) {
    host.services.pubsub.subscribe(topic)
    return {}
  },
  async subscribers ({ topic }) {
    return { peers: host.services.pubsub.getSubscribers(topic).map(String) }
  },
  async publish ({ topic, data }) {
    const { recipients } = await host.services.pubsub.publish(topic, bytes(data))
    return { peers: recipients.map(String) }
  },
  async put ({ key, value }) {
    const all = await answers(host.services.dht.put(utf8(key), bytes(value), options()), 'PUT_VALUE')
    return { peers: all.map(({ from }) => String(from)) }
  },
  async get ({ key }) {
    const all = await answers(host.services.dht.get(utf8(key), options()), 'GET_VALUE')
    return { values: all.filter(({ record }) => record != null).map(({ record }) => hex(record.value)) }
  },
  async provide ({ digest }) {
    const all = await answers(host.services.dht.provide(cid(digest), options()), 'ADD_PROVIDER')
    return { peers: all.map(({ from }) => String(from)) }
  },
  async findProviders ({ digest }) {
    const all = await answers(host.services.dht.findProviders(cid(digest), options()), 'GET_PROVIDERS')
    return { peers: [...new Set(all.flatMap(({ providers }) => providers).map(({ id }) => String(id)))] }
  },
  async findPeer ({ peer }) {
    for await (const event of host.services.dht.findPeer(peerIdFromString(peer), options())) {
      if (event.name === 'FINAL_PEER') return { addresses: event.peer.multiaddrs.map(String) }
    }
    return { addresses: [] }
  },
  async addresses () {
    return { addresses: host.getMultiaddrs().map(String) }
  }
}

for await (const line of createInterface({ input: process.stdin })) {
  const { id, op, ...parameters } = JSON.parse(line)
  operations[op](parameters).then(ok => print({ id, ok }), error => print({ id, error: String(error) }))
}
await host.stop()
process.exit(0)

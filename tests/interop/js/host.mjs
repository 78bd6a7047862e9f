// A js-libp2p host that speaks as ACI does: TCP, Noise and yamux; gossipsub without libp2p's signatures and with our
// message id; Kademlia under our protocol id.
import { createHash } from 'node:crypto'
import { circuitRelayServer, circuitRelayTransport } from '@libp2p/circuit-relay-v2'
import { gossipsub } from '@libp2p/gossipsub'
import { identify } from '@libp2p/identify'
import { kadDHT, passthroughMapper } from '@libp2p/kad-dht'
import { noise } from '@libp2p/noise'
import { ping } from '@libp2p/ping'
import { tcp } from '@libp2p/tcp'
import { yamux } from '@libp2p/yamux'
import { createLibp2p } from 'libp2p'

const LOOPBACK = '/ip4/127.0.0.1/tcp/0'

// SHA-256(topic, 0, data)
function messageId ({ topic, data }) {
  return createHash('sha256').update(topic).update('\0').update(data).digest()
}

export const pubsub = gossipsub({
  globalSignaturePolicy: 'StrictNoSign',
  msgIdFn: messageId,
  allowPublishToZeroTopicPeers: true
})

export const dht = kadDHT({
  protocol: '/aci/kad/1.0.0',
  clientMode: false,
  // Loopback addresses are addresses here.
  peerInfoMapper: passthroughMapper,
  validators: { aci: async () => {} },
  selectors: { aci: () => 0 }
})

// `services` are added to identify and ping. With `relay` it relays for others, and can be reached through the `circuits`.
export async function createHost ({ services = {}, circuits = [], relay = false } = {}) {
  return createLibp2p({
    addresses: { listen: [LOOPBACK, ...circuits] },
    transports: relay ? [tcp(), circuitRelayTransport()] : [tcp()],
    connectionEncrypters: [noise()],
    streamMuxers: [yamux()],
    connectionManager: { maxConnections: 500, inboundConnectionThreshold: 1000 },
    connectionGater: { denyDialMultiaddr: () => false },
    services: { identify: identify(), ping: ping(), ...services, ...(relay ? { relay: circuitRelayServer() } : {}) }
  })
}
